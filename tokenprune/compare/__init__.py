"""Methods and controls at equal budgets on the same questions: accuracy, loyalty, drift, memory and time."""
