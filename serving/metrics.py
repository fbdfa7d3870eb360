"""What the server counts, for Prometheus: vLLM's and OpenTelemetry's names where they exist, ours for the rest."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serving.answer import Origin
from serving.energy import Energy
from serving.scheduler import Ticket
from serving.service import Service

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The figures of one service."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._registry = CollectorRegistry()
        self._ttft = [self._seconds(name, "Time to first token, waiting included") for name in TTFT]
        self._tpot = [self._seconds(name, "Time per output token after the first, mean of a reply") for name in TPOT]
        self._duration = [self._seconds(name, "Time of a whole request, ready answers included") for name in DURATION]
        self._prompt = self._counter("vllm:prompt_tokens", "Tokens of prompts")
        self._reused = self._counter("vllm:prefix_cache_hits", "Tokens of prompts that were already computed")
        self._generated = self._counter("vllm:generation_tokens", "Tokens generated")
        self._ended = self._counter("vllm:request_success", "Finished requests", "finished_reason")
        self._refused = self._counter("emerald_requests_refused", "Requests that got an error", "status")
        self._lookups = self._counter("emerald_cache_lookups", "Questions, by what the cache had for them", "result")
        self._cpu = self._counter("emerald_cpu_seconds", "CPU time of requests", "source")
        self._joules = self._counter("emerald_energy_joules", "Energy of requests, see emerald_energy_source", "source")
        self._carbon = self._counter("emerald_carbon_grams", "CO2 equivalent of that energy")
        self._gauge("vllm:num_requests_running", "Replies being generated").set_function(self._running)
        self._gauge("vllm:num_requests_waiting", "Requests waiting for the model").set_function(self._waiting)
        self._gauge("emerald_load_progress", "How much of the model is loaded, 0 to 1").set_function(
            lambda: service.progress
        )
        self._gauge("emerald_certificate_false_hit_bound", "Certified limit of wrong answers, or NaN").set_function(
            self._bound
        )

    def render(self) -> bytes:
        """All figures in Prometheus's text format."""
        return generate_latest(self._registry)

    def refused(self, status: int) -> None:
        """Counts an error."""
        self._refused.labels(str(status)).inc()

    def looked_up(self, origin: Origin) -> None:
        """Counts what the cache had."""
        self._lookups.labels("miss" if origin.cached is None else origin.cached.tier).inc()

    def ended(self, ticket: Ticket, reason: str, seconds: float, energy: Energy, *, cached: bool) -> None:
        """Counts a request that was answered, or given up by its client (reason "abort")."""
        for name in self._duration:
            name.observe(seconds)
        self._ended.labels(reason).inc()
        self._cpu.labels("cache" if cached else "model").inc(energy.cpu_seconds)
        self._joules.labels(energy.source).inc(energy.joules)
        self._carbon.inc(energy.grams_co2e)
        self._prompt.inc(len(ticket.prompt))
        self._reused.inc(ticket.cached_tokens)
        self._generated.inc(ticket.tokens)
        if ticket.ttft_s is not None:
            for name in self._ttft:
                name.observe(ticket.ttft_s)
        if ticket.tpot_s is not None:
            for name in self._tpot:
                name.observe(ticket.tpot_s)

    def _running(self) -> float:
        return self._service.scheduler.running if self._service.scheduler else 0

    def _waiting(self) -> float:
        return self._service.scheduler.waiting if self._service.scheduler else 0

    def _bound(self) -> float:
        proof = self._service.storyteller.certificate if self._service.storyteller else None
        return proof.bound if proof else float("nan")

    def _seconds(self, name: str, help_text: str) -> Histogram:
        return Histogram(name, help_text, buckets=SECONDS, registry=self._registry)

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(name, help_text, labels, registry=self._registry)

    def _gauge(self, name: str, help_text: str) -> Gauge:
        return Gauge(name, help_text, registry=self._registry)


TTFT = ("vllm:time_to_first_token_seconds", "gen_ai_server_time_to_first_token_seconds")
TPOT = ("vllm:inter_token_latency_seconds", "gen_ai_server_time_per_output_token_seconds")
DURATION = ("vllm:e2e_request_latency_seconds", "gen_ai_server_request_duration_seconds")
