"""openai-agents: over Responses (its default), streamed, and over chat completions."""

import asyncio

from _common import ANSWER, MODEL, QUESTION, case, weather
from agents import Agent, Runner, function_tool, set_default_openai_api, set_tracing_disabled

set_tracing_disabled(True)  # its own traces would go to api.openai.com, whatever the base URL


def made(instructions: str) -> Agent:
    return Agent(name="Weather", instructions=instructions, tools=[function_tool(weather)], model=MODEL)


async def main() -> None:
    assert (await Runner.run(made("You use Responses."), QUESTION)).final_output == ANSWER
    case("agent over Responses", None, steps=3)
    run = Runner.run_streamed(made("You use Responses, streamed."), QUESTION)
    async for _ in run.stream_events():
        pass
    assert run.final_output == ANSWER
    case("agent over Responses, streamed", None, steps=3)
    set_default_openai_api("chat_completions")
    assert (await Runner.run(made("You use chat completions."), QUESTION)).final_output == ANSWER
    case("agent over chat completions", None, steps=3)


asyncio.run(main())
