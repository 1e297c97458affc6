"""What came out, read from MLflow and the study without Ray."""
