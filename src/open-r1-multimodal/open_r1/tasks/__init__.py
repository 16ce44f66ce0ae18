"""What is trained on and asked: SAT, CV-Bench and other benchmarks, and every form in which people bring examples."""
