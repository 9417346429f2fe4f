"""A model that turns texts into vectors, or ranks documents, on stock libllama in this process.

Each text is a batch of its own, so its vector does not depend on what else is asked. A vector is pooled as
the model's file says (`pooling_type`); a model that was made to write, and says nothing of it, gives the mean
of its tokens' last rows. Files are untrusted: this is for processes that may end.
"""

import ctypes
from pathlib import Path

import numpy as np

from cordee.engine.llama import libllama
from cordee.engine.llama.batch import NativeBatch
from cordee.engine.llama.vocabulary import LlamaVocabulary
from cordee.engine.stage import Batch
from cordee.errors import BadRequest, ContextExceeded, StageFailed, UnsupportedModel

# The most tokens of one text. A longer one takes memory by its square where attention goes both ways, and no
# model in use was trained with more.
TOKENS_MAX = 8192
POOLING_UNSPECIFIED, POOLING_NONE, POOLING_MEAN, POOLING_RANK = -1, 0, 1, 4  # enum llama_pooling_type


class LlamaEncoder:
    """The loaded model. `name` is what messages call it.

    `dimension` is the length of its vectors, 0 if it ranks: then only `rank` means something, else only the
    others. `context` is how many tokens a text may have.

    Raises:
        BadModelFile: libllama does not load the file.
        UnsupportedModel: libllama does not know this kind of model, or it gives no vectors.
        StageFailed: there is not enough memory.
    """

    def __init__(self, path: Path, name: str, threads: int | None = None) -> None:
        self.name = name
        self._library = libllama.load()
        self._vocabulary = LlamaVocabulary(path, name)
        self._context = None
        self._model = self._load(path)
        trained = self._library.llama_model_n_ctx_train(self._model)
        self.context = max(1, min(trained, TOKENS_MAX))
        self._context = self._made(threads, POOLING_UNSPECIFIED)
        if self._pooling == POOLING_NONE:
            self._library.llama_free(self._context)
            self._context = self._made(threads, POOLING_MEAN)
        self.ranks = self._pooling == POOLING_RANK
        self._width = (
            self._library.llama_model_n_cls_out(self._model)
            if self.ranks
            else self._library.llama_model_n_embd_out(self._model)
        )
        self.dimension = 0 if self.ranks else self._width
        self._batch = NativeBatch(self._library, self.context, 1)

    def embed(self, text: str, truncate: bool = False) -> tuple[np.ndarray, int]:
        """A text's vector, (dimension,) float32 of length 1, and how many tokens it has.

        Raises:
            ContextExceeded: it is too long.
            BadRequest: it is not valid Unicode.
        """
        return self.embed_tokens(self._tokens(text), truncate)

    def embed_tokens(self, tokens: list[int], truncate: bool = False) -> tuple[np.ndarray, int]:
        """The same for token ids. Raises as `embed` does."""
        for token in tokens:
            if not 0 <= token < self._vocabulary.size:
                raise BadRequest(f"{self.name} has no token {token}: it has {self._vocabulary.size}", "input")
        tokens = tokens[: self.context] if truncate else tokens
        vector = self._run(tokens, "input")
        length = float(np.sqrt(np.sum(vector.astype(np.float64) ** 2)))
        return (vector / np.float32(length) if length > 0 else vector), len(tokens)

    def rank(self, query: str, document: str) -> tuple[np.ndarray, int]:
        """How well a document answers a query: (1,) float32, the higher the better, and the tokens read.

        Raises:
            ContextExceeded: both together are too long.
        """
        if not self.ranks:
            raise BadRequest(
                f"{self.name} does not rank documents: its file says nothing of a score", "model"
            )
        tokens = self._pair(query, document)
        return self._run(tokens, "documents")[:1], len(tokens)

    def close(self) -> None:
        """Free libllama's memory; closing twice is harmless."""
        if self._context is not None:
            self._library.llama_free(self._context)
            self._context = None
        if self._model is not None:
            self._library.llama_model_free(self._model)
            self._model = None
        self._vocabulary.close()

    @property
    def _pooling(self) -> int:
        return self._library.llama_pooling_type(self._context)

    def _load(self, path: Path) -> int:
        params = self._library.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = libllama.survives_extra_buffers()
        return libllama.load_model(path, params, self.name)

    def _made(self, threads: int | None, pooling: int) -> int:
        params = self._library.llama_context_default_params()
        params.embeddings = True
        params.pooling_type = pooling
        # Attention that goes both ways needs a text whole in one micro-batch.
        params.n_ctx = params.n_batch = params.n_ubatch = self.context
        params.n_seq_max = 1
        params.n_threads = params.n_threads_batch = threads or libllama.usable_cores()
        params.no_perf = True
        context = self._library.llama_init_from_model(self._model, params)
        if not context:
            raise StageFailed(f"{self.name} cannot be used for vectors here: {libllama.reason()}")
        return context

    def _tokens(self, text: str) -> list[int]:
        """A text's tokens with those that the model wants around it; names of control tokens stay text."""
        tokens = self._vocabulary.tokenize(text, special=False, add_bos=True)
        return [*tokens, *self._ends()]

    def _pair(self, query: str, document: str) -> list[int]:
        """Query and document as a model that ranks was trained to read them (BERT's two segments)."""
        library, vocabulary = self._library, self._vocabulary
        separator = library.llama_vocab_sep(vocabulary.handle)
        ends, wants = self._ends(), library.llama_vocab_get_add_sep(vocabulary.handle)
        between = [separator] if wants and separator >= 0 and ends != [separator] else []
        second = vocabulary.tokenize(document, special=False, add_bos=False)
        return [*self._tokens(query), *between, *second, *ends]

    def _ends(self) -> list[int]:
        """What the model wants behind a text: its end token, BERT's separator, or nothing."""
        library, handle = self._library, self._vocabulary.handle
        if library.llama_vocab_get_add_eos(handle):
            end = library.llama_vocab_eos(handle)
        elif library.llama_vocab_get_add_sep(handle):
            end = library.llama_vocab_sep(handle)
        else:
            return []
        return [end] if end >= 0 else []

    def _run(self, tokens: list[int], param: str) -> np.ndarray:
        """The pooled row of some tokens: (width,) float32."""
        if not tokens:
            raise BadRequest("a text must have at least one token", param)
        if len(tokens) > self.context:
            raise ContextExceeded(
                f"a text has {len(tokens)} tokens; {self.name} reads up to {self.context}: cut it in pieces",
                param,
            )
        count = len(tokens)
        library = self._library
        memory = library.llama_get_memory(self._context)
        if memory:
            library.llama_memory_clear(memory, True)
        inputs = np.asarray(tokens, dtype=np.int32)
        zeros = np.zeros(count, dtype=np.int32)
        rows = Batch(inputs, np.arange(count, dtype=np.int32), zeros, np.ones(count, dtype=bool))
        libllama.log.clear()
        status = library.llama_decode(self._context, self._batch.fill(rows, all_outputs=True))
        if status != 0:
            raise StageFailed(f"{self.name} cannot read this text ({status}: {libllama.reason()})")
        found = library.llama_get_embeddings_seq(self._context, 0)
        if not found:
            raise UnsupportedModel(f"{self.name} gives no vectors: {libllama.reason()}")
        address = ctypes.addressof(found.contents)
        values = (ctypes.c_float * self._width).from_address(address)
        return np.frombuffer(values, np.float32).copy()
