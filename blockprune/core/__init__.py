"""What every stage shares: block geometry, the values that flow between stages, pipelines, masks as values and files, tables."""
