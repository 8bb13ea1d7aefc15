"""CrewAI: a crew of one agent with a tool."""

from _common import ANSWER, MODEL, QUESTION, case, weather
from crewai import LLM, Agent, Crew, Task
from crewai.tools import tool

helper = Agent(
    role="Weather helper",
    goal="Tell the weather",
    backstory="You use CrewAI.",
    tools=[tool("weather")(weather)],
    llm=LLM(model=MODEL, provider="openai"),
    verbose=False,
)
task = Task(description=QUESTION, expected_output="Degrees", agent=helper)
result = Crew(agents=[helper], tasks=[task], verbose=False).kickoff()
assert result.raw == ANSWER, result.raw
case("agent", None, steps=3)
