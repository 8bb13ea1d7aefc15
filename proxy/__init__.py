"""The recording gateway: an OpenAI endpoint that serves the current versions and journals every call."""
