"""What a site can know before it joins a job: is the data sound, is the machine fit, and what will the job cost."""
