"""The two computations of every mechanism: streaming softmax attention and linear recurrence."""
