"""What is computed next, and for whom: requests, their order, the plan of each step. Integers only."""
