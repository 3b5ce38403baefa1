"""Numbers for Prometheus, under vLLM's names with our prefix. Labels never come from clients."""

import itertools
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from dsv4_jax.serving.compiles import compiles
from dsv4_jax.serving.engine import EngineStatus
from dsv4_jax.serving.settings import EngineSettings
from dsv4_jax.serving.step_tokens import BOUNDS

PREFIX = "dsv4:"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKENS = tuple(float(4**power) for power in range(11))


class Metrics:
    """The numbers of one server.

    Args:
        model: the served name, a label of every number.
        status, sizes: of the engine, None while there is none.
    """

    def __init__(
        self,
        model: str,
        status: Callable[[], EngineStatus | None],
        sizes: Callable[[], EngineSettings | None],
    ) -> None:
        self.registry = CollectorRegistry()
        self._model, self._status, self._sizes = model, status, sizes
        self._compiles = compiles()
        self.registry.register(self)
        self.first_token = self._histogram("time_to_first_token_seconds", "From arrival", SECONDS)
        self.between_tokens = self._histogram("inter_token_latency_seconds", "Between outputs", SECONDS)
        self.whole = self._histogram("e2e_request_latency_seconds", "From arrival to the end", SECONDS)
        self.queueing = self._histogram("request_queue_time_seconds", "From arrival to a lane", SECONDS)
        self.prefilling = self._histogram("request_prefill_time_seconds", "To the first token", SECONDS)
        self.decoding = self._histogram("request_decode_time_seconds", "From it to the end", SECONDS)
        self.prompt_sizes = self._histogram("request_prompt_tokens", "Tokens of prompts", TOKENS)
        self.answer_sizes = self._histogram("request_generation_tokens", "Tokens of answers", TOKENS)
        self.successes = self._counter("request_success", "Answers", "finished_reason")
        self.rejected = self._counter("rejected_requests", "Refused requests", "reason")
        self.recoveries = self._counter("parser_recoveries", "Mended answers", "kind")
        self.disconnects = self._counter("disconnect_aborts", "Clients that left")
        self.slow_readers = self._counter("slow_reader_aborts", "Streams that nobody read")
        self.leak_guard = self._counter("dsml_leak_guard", "Markers of calls kept out of contents")
        self.corrupted = self._counter("corrupted_requests", "Answers whose logits were no numbers")

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def describe(self) -> Iterable[Metric]:
        """What `collect` gives; part of prometheus_client's interface of collectors."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """The engine's own numbers of this moment, and the compiler's."""
        found = self._compiles.count, self._compiles.seconds
        for name, text, value in zip(
            ("compile_events", "compile_seconds"),
            ("Compiled programs", "Spent with them"),
            found,
            strict=True,
        ):
            metric = CounterMetricFamily(PREFIX + name, text, labels=["model"])
            metric.add_metric([self._model], value)
            yield metric
        status = self._status()
        if status is None:
            return
        gauges = {
            "num_requests_running": ("Requests in slots", status.num_running),
            "num_requests_waiting": ("Requests without a slot", status.num_waiting),
        }
        counters = {
            "prefix_cache_queries": ("Prompt tokens looked up", status.prefix_tokens_asked),
            "prefix_cache_hits": ("Prompt tokens found", status.prefix_tokens_found),
            "prompt_tokens": ("Prompt tokens", status.prompt_tokens),
            "generation_tokens": ("Drawn tokens", status.generated_tokens),
            "num_preemptions": ("Interrupted requests", status.num_preemptions),
            "engine_steps": ("Steps of the engine", status.steps),
            "spec_decode_num_drafts": ("Steps that guessed", status.drafts[0][1] if status.drafts else 0),
            "spec_decode_num_draft_tokens": ("Guessed tokens", status.guesses),
            "spec_decode_num_accepted_tokens": ("Right guesses", sum(kept for kept, _ in status.drafts)),
        }
        for family, numbers in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (text, value) in numbers.items():
                metric = family(PREFIX + name, text, labels=["model"])
                metric.add_metric([self._model], value)
                yield metric
        name = PREFIX + "spec_decode_num_accepted_tokens_per_pos"
        places = CounterMetricFamily(name, "Right guesses by place", labels=["model", "position"])
        for place, (kept, _) in enumerate(status.drafts):
            places.add_metric([self._model, str(place)], kept)
        yield places
        yield self._steps(status)
        yield self._usage(status)

    def _steps(self, status: EngineStatus) -> Metric:
        name = PREFIX + "iteration_tokens_total"
        steps = HistogramMetricFamily(name, "Steps by the tokens they computed and drew", labels=["model"])
        if status.steps_by_tokens:
            bounds = [*map(float, BOUNDS), float("inf")]
            so_far = itertools.accumulate(status.steps_by_tokens)
            words = ["+Inf" if bound == float("inf") else str(bound) for bound in bounds]
            steps.add_metric([self._model], list(zip(words, so_far, strict=True)), status.step_tokens)
        return steps

    def _usage(self, status: EngineStatus) -> Metric:
        """Shares of memory in use: a slot owns its window and state whole, its other rows token by token."""
        name = PREFIX + "kv_cache_usage_perc"
        usage = GaugeMetricFamily(name, "Shares in use, 0 to 1", labels=["model", "pool"])
        if (sizes := self._sizes()) is not None:
            slots = status.num_running / sizes.num_slots
            tokens = status.tokens_held / (sizes.num_slots * sizes.max_length)
            shares = {"swa": slots, "csa": tokens, "hca": tokens, "indexer": tokens, "state": slots}
            if sizes.num_pages:
                shares["prefix"] = status.prefix_pages / sizes.num_pages
            for pool, share in shares.items():
                usage.add_metric([self._model, pool], share)
        return usage

    def _counter(self, name: str, text: str, label: str | None = None) -> Counter:
        labels = ("model", label) if label else ("model",)
        return _bound(Counter(PREFIX + name, text, labels, registry=self.registry), self._model, label)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(PREFIX + name, text, ("model",), buckets=buckets, registry=self.registry)
        return made.labels(self._model)


class _Labelled:
    """A counter with one more label than the model's name."""

    def __init__(self, counter: Counter, model: str) -> None:
        self._counter, self._model = counter, model

    def labels(self, value: str) -> Counter:
        return self._counter.labels(self._model, value)


def _bound(counter: Counter, model: str, label: str | None) -> "Counter | _Labelled":
    return _Labelled(counter, model) if label else counter.labels(model)
