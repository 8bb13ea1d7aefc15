"""AutoGen: an assistant with a tool, several tool rounds."""

import asyncio

from _common import ANSWER, MODEL, QUESTION, case, weather
from autogen_agentchat.agents import AssistantAgent
from autogen_ext.models.openai import OpenAIChatCompletionClient

INFO = {"vision": False, "function_calling": True, "json_output": True, "family": "unknown", "structured_output": True}


async def run(stream: bool) -> None:
    model = OpenAIChatCompletionClient(model=MODEL, model_info=INFO)
    agent = AssistantAgent(
        "assistant",
        model,
        tools=[weather],
        system_message=f"You use AutoGen. {stream}",
        max_tool_iterations=5,
        model_client_stream=stream,
    )
    result = await agent.run(task=QUESTION)
    assert result.messages[-1].content == ANSWER, result
    await model.close()


asyncio.run(run(False))
case("agent", None, steps=3)
asyncio.run(run(True))
case("agent, streamed", None, steps=3)
