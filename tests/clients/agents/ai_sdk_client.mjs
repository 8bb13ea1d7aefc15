// Vercel's AI SDK: an agent over chat completions and over Responses, streamed and not.
import { generateText, stepCountIs, streamText, tool } from "ai";
import { createOpenAI } from "@ai-sdk/openai";
import { z } from "zod";
import { ANSWER, MODEL, QUESTION, assert, done, weather } from "./_common.mjs";

const openai = createOpenAI({ baseURL: process.env.OPENAI_BASE_URL });
const tools = {
  weather: tool({
    description: "The weather in a city.",
    inputSchema: z.object({ city: z.string() }),
    execute: async ({ city }) => weather(city),
  }),
};

for (const [name, model] of [
  ["chat completions", openai.chat(MODEL)],
  ["Responses", openai.responses(MODEL)],
]) {
  const asked = { model, tools, prompt: QUESTION, stopWhen: stepCountIs(5) };
  const whole = await generateText({ ...asked, system: `You use the AI SDK over ${name}.` });
  assert(whole.text === ANSWER);
  done(`agent over ${name}`, 3);
  const streamed = streamText({ ...asked, system: `You use the AI SDK over ${name}, streamed.` });
  let text = "";
  for await (const part of streamed.textStream) text += part;
  assert(text.endsWith(ANSWER));
  done(`agent over ${name}, streamed`, 3);
}
