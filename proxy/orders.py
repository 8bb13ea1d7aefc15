"""What a body may not say to a translated call: where to go, with which credentials, or how the library is to behave.

LiteLLM would take these fields as orders, and send the configured key wherever a client likes. They are refused, not
dropped, so that nobody believes in them. (A raw relay passes a body on as the bytes it is; its target is the config's.)
"""

from proxy.dialects.base import Json
from proxy.errors import BadRequest

_ORDERS = frozenset(
    (
        *("api_base", "base_url", "custom_api_base", "api_key", "api_version", "api_type", "organization", "project"),
        *("extra_headers", "headers", "extra_body", "extra_query", "custom_llm_provider", "deployment_id", "client"),
        *("model_list", "fallbacks", "context_window_fallbacks", "region_name", "proxy", "ssl_verify", "timeout"),
        *("mock_response", "mock_tool_calls", "callbacks", "success_callback", "failure_callback", "guardrails"),
        *("hf_model_name", "shared_session", "use_in_pass_through", "configurable_clientside_auth_params"),
        *("input_cost_per_token", "output_cost_per_token", "num_retries", "max_retries", "no-log", "hooks"),
    )
)
_PREFIXES = ("aws_", "azure_", "bedrock_", "gcs_", "litellm_", "oci_", "s3_", "sagemaker_", "vertex_", "watsonx_")


def refuse(body: Json) -> None:
    """Raises BadRequest that names the first field which is an order."""
    for name in body:
        if name in _ORDERS or name.startswith(_PREFIXES):
            raise BadRequest(
                f"`{name[:64]}` is not a client's to choose: where this model goes is in the server's configuration",
                param=name[:64],
                code="parameter_not_allowed",
            )
