"""What a recorded call costs, beside a bare relay and other gateways, in one interleaved run: `make bench-gateway`."""
