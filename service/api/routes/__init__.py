"""The routes under `/v1`, of health, metrics and pages, a file for each group.

Routes know requests and responses; they start no processes and own no queue.
"""
