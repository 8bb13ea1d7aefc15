"""The offline optimizer: episodes in, candidate versions out, promoted on held-out evidence only."""
