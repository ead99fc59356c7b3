"""The server: OpenAI's HTTP API in front of a model, whose replies are what several draws agree on."""
