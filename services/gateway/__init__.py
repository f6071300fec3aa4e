"""The gateway: an OpenAI request gets exactly one answer or one error."""
