"""smolagents: an agent that calls tools."""

import os

from _common import ANSWER, MODEL, QUESTION, case, weather
from smolagents import OpenAIModel, ToolCallingAgent, tool


@tool
def weather_tool(city: str) -> str:
    """The weather in a city.

    Args:
        city: Which city.
    """
    return weather(city)


weather_tool.name = "weather"
model = OpenAIModel(model_id=MODEL, api_base=os.environ["OPENAI_BASE_URL"], api_key=os.environ["OPENAI_API_KEY"])
agent = ToolCallingAgent(tools=[weather_tool], model=model, max_steps=5, verbosity_level=0)
assert agent.run(QUESTION) == ANSWER
case("agent", None, steps=3)
