"""An agent as people write it with LangGraph: one tool, two model calls. The environment's base URL is all it knows."""

import os

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.prebuilt import create_react_agent


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return "18 degrees"


agent = create_react_agent(
    ChatOpenAI(model=os.environ.get("OPENAI_MODEL", "scripted")), [weather], prompt="You are a weather helper."
)
print(agent.invoke({"messages": [("user", "Weather in Paris?")]})["messages"][-1].content)
