"""pydantic-ai: an agent over chat completions, streamed, and over Responses."""

import asyncio

from _common import ANSWER, MODEL, QUESTION, case, weather
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel

agent = Agent(OpenAIChatModel(MODEL), system_prompt="You use pydantic-ai.", tools=[weather])
assert agent.run_sync(QUESTION).output == ANSWER
case("agent", None, steps=3)

agent = Agent(OpenAIResponsesModel(MODEL), instructions="You use pydantic-ai over Responses.", tools=[weather])
assert agent.run_sync(QUESTION).output == ANSWER
case("agent over Responses", None, steps=3)


async def streamed() -> None:
    agent = Agent(OpenAIChatModel(MODEL), system_prompt="You use pydantic-ai, streamed.", tools=[weather])
    async with agent.run_stream(QUESTION) as run:
        assert await run.get_output() == ANSWER


asyncio.run(streamed())
case("agent, streamed", None, steps=3)
