"""An agent as people write it with openai-agents: one tool, two model calls. It uses the Responses API by default."""

import os

from agents import Agent, Runner, function_tool, set_tracing_disabled


@function_tool
def weather(city: str) -> str:
    """The weather in a city."""
    return "18 degrees"


set_tracing_disabled(True)  # its own traces would go to api.openai.com, whatever the base URL
agent = Agent(
    name="Weather",
    instructions="You are a weather helper.",
    tools=[weather],
    model=os.environ.get("OPENAI_MODEL", "scripted"),
)
print(Runner.run_sync(agent, "Weather in Paris?").final_output)
