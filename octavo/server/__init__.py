"""The front: HTTP in OpenAI's shapes."""
