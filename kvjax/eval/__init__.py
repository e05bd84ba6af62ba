"""Evaluation: tasks and data sets, metrics, and a runner over an engine in this process or any server."""
