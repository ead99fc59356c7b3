"""A chat model for LangChain that keeps what the server says of the vote."""

from __future__ import annotations

from typing import Any

from langchain_openai import ChatOpenAI

from consilience.serve.schema import EXTENSION


class ChatConsilience(ChatOpenAI):
    """`ChatOpenAI` in front of `consilience serve`: ``response_metadata["consilience"]`` holds the vote.

    It takes what `ChatOpenAI` takes and asks as it does; that one works with the server too, but drops fields of a
    reply that it does not know. In a stream the field is on the last chunk of the text, and on the sum of all.
    """

    def _create_chat_result(self, response: Any, generation_info: dict[str, Any] | None = None) -> Any:
        result = super()._create_chat_result(response, generation_info)
        told = response.get(EXTENSION) if isinstance(response, dict) else getattr(response, EXTENSION, None)
        if told is not None:
            for generation in result.generations:
                generation.message.response_metadata[EXTENSION] = told
        return result

    def _convert_chunk_to_generation_chunk(
        self, chunk: dict[str, Any], default_chunk_class: type, base_generation_info: dict[str, Any] | None
    ) -> Any:
        made = super()._convert_chunk_to_generation_chunk(chunk, default_chunk_class, base_generation_info)
        inner = chunk.get("chunk") or chunk  # where the reply has a schema, the client wraps its chunks
        if made is not None and inner.get("choices") and EXTENSION in inner:
            made.message.response_metadata[EXTENSION] = inner[EXTENSION]
        return made
