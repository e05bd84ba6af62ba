"""Evaluators of candidates: one protocol, and implementations for token budgets, RocketKV's numbers, and Ray actors."""
