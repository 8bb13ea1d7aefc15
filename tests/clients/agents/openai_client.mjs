// npm's openai: an agent over chat completions and over Responses, streamed and not, and structured output.
import OpenAI from "openai";
import { ANSWER, MODEL, QUESTION, PARAMETERS, assert, done, weather } from "./_common.mjs";

const client = new OpenAI();
const tools = [{ type: "function", function: { name: "weather", parameters: PARAMETERS } }];

async function chat(stream) {
  const messages = [
    { role: "system", content: `You use npm's openai. ${stream}` },
    { role: "user", content: QUESTION },
  ];
  for (;;) {
    const reply = stream
      ? (await client.chat.completions.stream({ model: MODEL, messages, tools }).finalChatCompletion()).choices[0].message
      : (await client.chat.completions.create({ model: MODEL, messages, tools })).choices[0].message;
    if (!reply.tool_calls?.length) return reply.content;
    messages.push(reply);
    for (const call of reply.tool_calls) {
      messages.push({ role: "tool", tool_call_id: call.id, content: weather(JSON.parse(call.function.arguments).city) });
    }
  }
}

for (const stream of [false, true]) {
  assert((await chat(stream)) === ANSWER);
  done(stream ? "agent, streamed" : "agent", 3);
}

const flat = [{ type: "function", name: "weather", parameters: PARAMETERS, strict: false }];
const input = [{ role: "user", content: QUESTION }];
let response;
for (;;) {
  response = await client.responses.create({ model: MODEL, instructions: "You use Responses.", input, tools: flat });
  const calls = response.output.filter((item) => item.type === "function_call");
  if (!calls.length) break;
  input.push(...response.output);
  for (const call of calls) {
    input.push({ type: "function_call_output", call_id: call.call_id, output: weather(JSON.parse(call.arguments).city) });
  }
}
assert(response.output_text === ANSWER);
done("Responses agent", 3);

let text = "";
for await (const event of await client.responses.create({ model: MODEL, input: "Hello, streamed", stream: true })) {
  if (event.type === "response.output_text.delta") text += event.delta;
}
assert(text === ANSWER);
done("Responses, streamed", 1);
