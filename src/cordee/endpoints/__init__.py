"""The application, and the other APIs over the same core: Responses, Anthropic's messages, Ollama's."""
