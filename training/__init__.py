"""Fine-tuning: labelled rows in, a registered model out. Knows db, and nothing of queues or Celery."""
