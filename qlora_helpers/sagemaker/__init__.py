"""Starts SageMaker training jobs and endpoints, and lists and stops what runs and costs there."""
