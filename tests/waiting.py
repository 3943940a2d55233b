"""Waiting for what another thread or process does."""

import time

import pytest


def until(holds):
    for _ in range(6000):
        if holds():
            return
        time.sleep(0.01)
    pytest.fail("it never comes to that")
