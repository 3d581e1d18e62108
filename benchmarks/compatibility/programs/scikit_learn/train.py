"""Learns from batches that come one after the other, and keeps the estimator after each one."""

import os
import time
from pathlib import Path

import joblib
import numpy as np
from sklearn.datasets import make_classification
from sklearn.linear_model import SGDClassifier
from sklearn.preprocessing import StandardScaler

PACE_S = float(os.environ["PACE_S"])

FOLDER = Path(os.environ["SPOTFIRST_CHECKPOINT_DIR"])
BATCHES = 40

X, y = make_classification(4000, 30, n_informative=10, n_classes=3, random_state=4)
newest = max(FOLDER.glob("batch-*.joblib"), key=lambda path: path.stat().st_mtime, default=None)
if newest is not None:
    print("going on after", newest.name)
    scaler, model, chance, scores = joblib.load(newest)
else:
    scaler, model = StandardScaler(), SGDClassifier(loss="log_loss", random_state=4)
    chance, scores = np.random.RandomState(4), []
for number in range(len(scores), BATCHES):
    chosen = chance.randint(0, 3000, 64)
    scaler.partial_fit(X[chosen])
    model.partial_fit(scaler.transform(X[chosen]), y[chosen], classes=[0, 1, 2])
    scores.append(model.score(scaler.transform(X[3000:]), y[3000:]))
    time.sleep(PACE_S)
    joblib.dump((scaler, model, chance, scores), FOLDER / f"batch-{number:03d}.joblib", compress=3)
    for old in sorted(FOLDER.glob("batch-*.joblib"))[:-2]:
        old.unlink()
np.savetxt(FOLDER / "scores.csv", scores)
joblib.dump((scaler, model), FOLDER / "model.joblib")
# A pickle of equal values may have other bytes, once one of them was loaded.
values = (scaler.mean_, scaler.var_, model.coef_, model.intercept_)
np.save(FOLDER / "values.npy", np.concatenate([each.ravel() for each in values]))
time.sleep(0.5)
