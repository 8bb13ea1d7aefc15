"""LangChain and LangGraph: an agent over chat completions, streamed, and over Responses."""

from _common import ANSWER, MODEL, QUESTION, case, weather
from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

asked = {"messages": [("user", QUESTION)]}
agent = create_agent(ChatOpenAI(model=MODEL), [tool(weather)], system_prompt="You use LangGraph.")
assert agent.invoke(asked)["messages"][-1].text == ANSWER
case("agent", None, steps=3)

model = ChatOpenAI(model=MODEL, streaming=True, stream_usage=True)
agent = create_agent(model, [tool(weather)], system_prompt="You use LangGraph, streamed.")
words = [part for part, _ in agent.stream(asked, stream_mode="messages")]
assert ANSWER in "".join(part.text for part in words)
case("agent, streamed", None, steps=3)

model = ChatOpenAI(model=MODEL, use_responses_api=True)
agent = create_agent(model, [tool(weather)], system_prompt="You use LangGraph over Responses.")
assert agent.invoke(asked)["messages"][-1].text == ANSWER
case("agent over Responses", None, steps=3)
