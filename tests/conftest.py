"""How hypothesis looks for examples: the same ones each time where a result must repeat, new ones elsewhere.

`make test` and a CI that says so (CI=true) repeat themselves; a bare `pytest` explores. A slow machine is no failure.
"""

import os
import signal

from hypothesis import HealthCheck, settings

PATIENT = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}

settings.register_profile("explore", settings.get_profile("default"), **PATIENT)
settings.register_profile("repeat", settings.get_profile("explore"), derandomize=True, database=None)
settings.load_profile("repeat" if os.environ.get("CI") or os.environ.get("RATCHET_REPEAT") else "explore")

# A shell without job control has what it starts in the background ignore Ctrl-C, and children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
