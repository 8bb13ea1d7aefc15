"""DSPy: a ReAct module with a tool."""

import dspy
from _common import ANSWER, MODEL, QUESTION, case, weather

dspy.configure(lm=dspy.LM(f"openai/{MODEL}", cache=False))
assert dspy.ReAct("question -> answer", tools=[weather], max_iters=5)(question=QUESTION).answer == ANSWER
case("ReAct", None, steps=4)
