"""Text in, text out: tokenizers, chat templates, detokenisation, stop strings. Used by the server and the offline LLM."""
