"""What pruning is made of: budgets, schedules, scores, merging. Plain functions over tensors."""
