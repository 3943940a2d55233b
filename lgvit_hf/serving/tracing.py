"""Spans of OpenTelemetry, where its package is installed and a provider is set; else nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

try:
    from opentelemetry import propagate, trace
except ImportError:
    trace = None


@contextmanager
def span(name: str, headers: Mapping[str, str] | None = None) -> Iterator[None]:
    """A span around what is done here.

    Args:
        name (`str`): Of the span.
        headers (`Mapping`, *optional*): Of a request; the span belongs to what its `traceparent` says.
    """
    if trace is None or isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        yield
        return
    context = None if headers is None else propagate.extract(headers)
    with trace.get_tracer("lgvit_hf").start_as_current_span(name, context=context):
        yield
