// An agent as people write it: the openai package, two turns with a tool, one streamed answer. The only setting is the
// environment's OPENAI_BASE_URL, which the SDK reads by itself.
import OpenAI from "openai";

const client = new OpenAI();
const model = process.env.OPENAI_MODEL ?? "scripted";
const messages = [
  { role: "system", content: "You are a weather helper." },
  { role: "user", content: "Weather in Paris?" },
];
const tools = [
  {
    type: "function",
    function: {
      name: "weather",
      parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
    },
  },
];

const first = await client.chat.completions.create({ model, messages, tools });
const reply = first.choices[0].message;
messages.push(reply);
for (const call of reply.tool_calls ?? []) {
  messages.push({ role: "tool", tool_call_id: call.id, content: "18 degrees" });
}

let answer = "";
for await (const chunk of await client.chat.completions.create({ model, messages, tools, stream: true })) {
  answer += chunk.choices[0]?.delta?.content ?? "";
}
console.log(answer);
