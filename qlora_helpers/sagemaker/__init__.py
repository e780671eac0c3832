"""SageMaker training jobs and endpoints, what runs there and what it costs."""
