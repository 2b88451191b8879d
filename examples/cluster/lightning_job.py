"""Start a run on several machines of Lightning AI: python lightning_job.py STUDIO "--config run.yaml"

Needs ``pip install lightning-sdk`` and ``lightning login``. The Studio holds the code, the installed package and the
configuration; the job works on a copy of it.
"""

import sys

from lightning_sdk import Job, Machine, Studio

MACHINES, DEVICES = 2, 8

studio, arguments = sys.argv[1:]
job = Job.run(
    name="lightrft",
    studio=Studio(studio, create_ok=False),
    machine=Machine.H100_X_8,
    num_machines=MACHINES,
    # Each machine runs this once and is told its NODE_RANK; Fabric starts the processes of its devices.
    command=f"lightrft fit {arguments} --trainer.devices {DEVICES} --trainer.num_nodes {MACHINES}",
)
print(job.link)
