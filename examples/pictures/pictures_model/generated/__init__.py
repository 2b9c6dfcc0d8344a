"""Generated pictures with questions and answers: what the demonstration model is trained on and
measured with."""
