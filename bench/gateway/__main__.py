"""`python -m bench.gateway`: the whole comparison, or parts of it while something is being tuned."""

import argparse

from bench.gateway.run import Plan, run


def main() -> None:
    """Read the flags, run. Exits with 1 where a call of ours was lost or doubled."""
    parser = argparse.ArgumentParser(prog="python -m bench.gateway", description=__doc__)
    parser.add_argument("--rounds", type=int, default=4, help="rounds over all targets and scenarios (4)")
    parser.add_argument("--only", metavar="TARGET", nargs="+", help="floor ours unrecorded tensorzero portkey litellm")
    parser.add_argument("--scenario", metavar="NAME", nargs="+", help="json_c1 json_c16 json_6kb sse_unpaced sse_paced")
    parser.add_argument("--scale", type=float, default=1.0, help="how long each load lasts, times its default")
    parser.add_argument("--quick", action="store_true", help="without boot times and memory after 50,000 calls")
    flags = parser.parse_args()
    result = run(Plan(flags.rounds, flags.only, flags.scenario, flags.scale, flags.quick))
    kept = result.notes["integrity"]
    if kept and not kept["complete"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
