"""Fine-tuning: from labelled rows to a registered model. Imports `db`, and neither Celery nor the stream."""
