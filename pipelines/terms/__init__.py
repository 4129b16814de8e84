"""What all steps of a job share: its tasks and their fields, an image of the plan, the columns of its tables."""
