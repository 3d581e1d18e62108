"""A GAN on small pictures: two networks, two optimizers, shuffled data with noise from workers, an EMA."""

import os
import time

import torch
from torch import nn

from spotfirst import Checkpointer
from spotfirst.checkpointer import weights_sha256
from spotfirst.integrations.dataloader import ResumableLoader

PACE_S = float(os.environ["PACE_S"])

EPOCHS, BATCH, NOISE = 4, 16, 16

torch.manual_seed(2)
torch.set_num_threads(1)


class Pictures(torch.utils.data.Dataset):
    """Spots at places that follow from the number; a little noise each time."""

    def __len__(self):
        return 250

    def __getitem__(self, number):
        x = torch.linspace(-1, 1, 16)
        at = torch.tensor([(number * 37 % 100) / 50 - 1, (number * 61 % 100) / 50 - 1])
        spot = torch.exp(-8 * ((x[None] - at[0]) ** 2 + (x[:, None] - at[1]) ** 2))
        return (spot + 0.05 * torch.randn(16, 16))[None]


generator = nn.Sequential(
    nn.ConvTranspose2d(NOISE, 32, 4, 1),
    nn.BatchNorm2d(32),
    nn.ReLU(),
    nn.ConvTranspose2d(32, 16, 4, 2, 1),
    nn.BatchNorm2d(16),
    nn.ReLU(),
    nn.ConvTranspose2d(16, 1, 4, 2, 1),
    nn.Tanh(),
)
discriminator = nn.Sequential(
    nn.Conv2d(1, 16, 4, 2, 1),
    nn.LeakyReLU(0.2),
    nn.Dropout(0.2),
    nn.Conv2d(16, 32, 4, 2, 1),
    nn.BatchNorm2d(32),
    nn.LeakyReLU(0.2),
    nn.Conv2d(32, 1, 4),
    nn.Flatten(0),
)
average = torch.optim.swa_utils.AveragedModel(
    generator, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
)
optimizer_g = torch.optim.Adam(generator.parameters(), lr=2e-3, betas=(0.5, 0.999))
optimizer_d = torch.optim.RMSprop(discriminator.parameters(), lr=5e-4)
loss_of = nn.BCEWithLogitsLoss()
loader = ResumableLoader(
    torch.utils.data.DataLoader(Pictures(), batch_size=BATCH, shuffle=True, num_workers=2)
)

checkpointer = Checkpointer(
    generator=generator,
    discriminator=discriminator,
    average=average,
    optimizer_g=optimizer_g,
    optimizer_d=optimizer_d,
    loader=loader,
)
checkpointer.expect(EPOCHS * len(loader))
done = checkpointer.restore()
for _ in range(loader.epoch, EPOCHS):
    for real in loader:
        made = generator(torch.randn(len(real), NOISE, 1, 1))
        optimizer_d.zero_grad()
        loss_d = loss_of(discriminator(real), torch.ones(len(real)))
        loss_d = loss_d + loss_of(discriminator(made.detach()), torch.zeros(len(real)))
        loss_d.backward()
        optimizer_d.step()
        if done % 2 == 0:  # the other one learns half as often
            optimizer_g.zero_grad()
            loss_g = loss_of(discriminator(made), torch.ones(len(real)))
            loss_g.backward()
            optimizer_g.step()
            average.update_parameters(generator)
        time.sleep(PACE_S)
        done += 1
        checkpointer.step(done, loss_d=loss_d)
checkpointer.close()
print(
    f"weights {weights_sha256(generator)} {weights_sha256(discriminator)} {weights_sha256(average)}"
)
