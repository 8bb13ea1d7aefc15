"""An agent that instruments itself by OpenTelemetry alone: `otel_agent.py INSTRUMENTOR`. It knows nothing of Ratchet.

An `invoke_agent` span around two calls and a tool's run between them, and an evaluation of the whole at the end.
INSTRUMENTOR: openai-v2 (OpenTelemetry's own), openinference, openllmetry. Prints the trace id.
"""

import os
import sys

from openai import OpenAI
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor


def instrument(which: str, provider: TracerProvider) -> None:
    if which == "openinference":
        from openinference.instrumentation.openai import OpenAIInstrumentor as OpenInference

        OpenInference().instrument(tracer_provider=provider)
    elif which == "openllmetry":
        from opentelemetry.instrumentation.openai import OpenAIInstrumentor as OpenLLMetry

        OpenLLMetry().instrument(tracer_provider=provider)
    else:
        from opentelemetry.instrumentation.openai_v2 import OpenAIInstrumentor as OpenTelemetry

        OpenTelemetry().instrument(tracer_provider=provider)


def main() -> None:
    endpoint = os.environ["OPENAI_BASE_URL"].removesuffix("/v1") + "/v1/traces"
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    trace.set_tracer_provider(provider)
    instrument(sys.argv[1], provider)
    tracer = trace.get_tracer("agent")
    client = OpenAI()
    question = {"role": "user", "content": "What is 6 times 7?"}
    with tracer.start_as_current_span("invoke_agent solver") as root:
        root.set_attributes({"gen_ai.operation.name": "invoke_agent", "gen_ai.agent.name": "solver"})
        first = client.chat.completions.create(model="fake-model", messages=[question], temperature=0.5)
        with tracer.start_as_current_span("execute_tool multiply") as tool:
            tool.set_attributes(
                {
                    "gen_ai.operation.name": "execute_tool",
                    "gen_ai.tool.name": "multiply",
                    "gen_ai.tool.call.id": "call_1",
                    "gen_ai.tool.call.arguments": '{"a": 6, "b": 7}',
                    "gen_ai.tool.call.result": "42",
                }
            )
        reply = {"role": "assistant", "content": first.choices[0].message.content}
        client.chat.completions.create(
            model="fake-model", messages=[question, reply, {"role": "user", "content": "Say it again."}]
        )
        root.add_event(
            "gen_ai.evaluation.result",
            {
                "gen_ai.evaluation.name": "reward",
                "gen_ai.evaluation.score.value": 0.75,
                "gen_ai.evaluation.explanation": "close",
            },
        )
    print(f"{root.get_span_context().trace_id:032x}")
    provider.shutdown()


if __name__ == "__main__":
    main()
