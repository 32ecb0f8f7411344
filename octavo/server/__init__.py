"""The front: HTTP in OpenAI's and Anthropic's shapes."""
