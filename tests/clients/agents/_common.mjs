// What the JavaScript agents share.
export const MODEL = process.env.OPENAI_MODEL ?? "scripted";
export const QUESTION = "Weather in Paris, then Rome?";
export const ANSWER = "It is 18 degrees in Paris and 21 in Rome.";
export const PARAMETERS = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const DEGREES = { Paris: "18 degrees", Rome: "21 degrees" };

export function weather(city) {
  return DEGREES[city];
}

export function assert(truth) {
  if (!truth) throw new Error("not as expected");
}

export function done(name, calls, episodes = 1) {
  console.log(JSON.stringify({ case: name, calls, episodes }));
}
