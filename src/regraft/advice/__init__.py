"""Advice before training: which layers to freeze, and which network to take."""

from regraft.advice.result import Advice, DepthAdvice, Ranking

__all__ = ["Advice", "DepthAdvice", "Ranking"]
