"""The same agent as a classic in-process script: a function that takes a prompt and returns its reward.

Nothing but the openai SDK and four names of `optimize.api`. From the repository's root, with OPENAI_BASE_URL and
OPENAI_API_KEY set for any model: python examples/capital_city/classic.py
"""

import json
import os
from pathlib import Path

from grader import grade
from openai import AsyncOpenAI

from optimize.api import APO, PromptTemplate, Trainer, rollout

client = AsyncOpenAI()
model = os.environ.get("OPENAI_MODEL", "gemma-3-270m")


@rollout
async def capital_agent(task: dict, prompt_template: PromptTemplate) -> float:
    reply = await client.chat.completions.create(
        model=model,
        temperature=0,
        max_tokens=16,
        messages=[
            {"role": "system", "content": prompt_template.format(**task)},
            {"role": "user", "content": f"Capital of {task['country']}?"},
        ],
    )
    return grade(task, (reply.choices[0].message.content or "").replace("\n", " "))


if __name__ == "__main__":
    lines = Path(__file__).with_name("tasks.jsonl").read_text().splitlines()
    tasks = [json.loads(line) for line in lines][: int(os.environ.get("TASKS", "80"))]
    trainer = Trainer(
        algorithm=APO(inference_client=client, model=model, budget=int(os.environ.get("BUDGET", "100"))),
        n_runners=4,
        initial_resources={"prompt_template": PromptTemplate("You are a geography helper.", engine="f-string")},
    )
    result = trainer.fit(agent=capital_agent, train_dataset=tasks)
    print(result.verdict, result.holdout)
