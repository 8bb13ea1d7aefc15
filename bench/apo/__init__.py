"""Prompt search on worlds with a known optimum, beside the real gepa and the real APO of agentlightning."""
